"""One run in several processes: how they are started, how they talk, and how the model is spread over them."""
