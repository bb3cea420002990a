"""Folders: loading, saving, exporting."""
