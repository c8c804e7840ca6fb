"""What is said about a run to MLflow, TensorBoard or Weights & Biases, and what is sent later."""
