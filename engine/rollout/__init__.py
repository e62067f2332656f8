"""Acting: prompts -> responses -> scores -> experience."""
