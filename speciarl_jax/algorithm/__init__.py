"""One step of the method: gather, credit, learn."""
