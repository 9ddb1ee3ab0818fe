"""Lets `pytest --nbmake notebooks` judge what it executes, as tests/chapters.py says."""

from nbmake import pytest_items

from tests.chapters import Chapter

pytest_items.NotebookRun = Chapter
