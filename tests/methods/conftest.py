"""The tiny models and recipes of `tiny_runs`, as fixtures."""

from tiny_runs import bert_folder, colour_recipe, colours, llama_folder, quick_page, real_page, text_recipe

__all__ = ["bert_folder", "colour_recipe", "colours", "llama_folder", "quick_page", "real_page", "text_recipe"]
