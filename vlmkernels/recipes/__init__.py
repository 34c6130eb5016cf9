"""Whole tasks on a page: data, training, evaluation."""
