"""Our policy against transformers', component by component."""
