"""What is computed: language models and scalar heads from transformers. Nothing here knows about ranks."""
