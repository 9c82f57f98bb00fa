"""Where examples come from: built data sets, folders, Hugging Face directories."""
