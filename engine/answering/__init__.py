"""Trained models as their users meet them: responses to a file of prompts, and a chat on the terminal."""
