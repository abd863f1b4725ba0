"""The paper's tables and experiments on images, as plans of commands."""
