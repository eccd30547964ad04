"""Tasks: data from files, the Hub or the embedded demo, divided, tokenised and collated."""

from .build import build_task
from .config import TaskConfig, task_from
from .loss import row_loss
from .rows import Rows
from .schema import Document, Example
from .task import Task

__all__ = ["Document", "Example", "Rows", "Task", "TaskConfig", "build_task", "row_loss", "task_from"]
