"""Rewrite passes, one rewrite a file. Each takes a program and returns a new one; none decides a form."""

from .base import Pass, PassResult
from .fold import FinishFolding, FoldToDense, FoldToFactors
from .insert_branches import InsertBranches
from .remove_branches import RemoveBranches

__all__ = [
    "FinishFolding",
    "FoldToDense",
    "FoldToFactors",
    "InsertBranches",
    "Pass",
    "PassResult",
    "RemoveBranches",
]
