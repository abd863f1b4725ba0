"""The paper's tables and the ablations as commands."""
