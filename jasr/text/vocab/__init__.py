"""Vocabularies that grow: merging tokenizers (merge), heads for more tokens (expand), training
tokenizers (train)."""
