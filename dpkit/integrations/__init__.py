"""Other people's tools: callbacks that tell them what a run does. Each file needs an extra, and says which."""
