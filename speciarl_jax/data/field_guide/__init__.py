"""The field guide: a rendered data set of birds, flowers, aircraft and dogs, with its taxonomy."""
