"""The paper's tables, its ablations, and experiments on images, as plans of commands or in one process."""
