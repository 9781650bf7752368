"""Importing other projects' checkpoints, without executing what they hold."""
