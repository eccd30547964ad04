"""Tasks: data from files, the Hub or the embedded demo, divided, tokenised and collated."""

from .config import TaskConfig
from .loss import row_loss
from .rows import Rows
from .schema import Document, Example
from .task import Task, build_task

__all__ = ["Document", "Example", "Rows", "Task", "TaskConfig", "build_task", "row_loss"]
