"""Results: scores, predicted masks, tables, figures, checks of a data set."""
