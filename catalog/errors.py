"""What is wrong with the data, in words for the person who brought it."""


class CatalogError(ValueError):
    """Input that makes no catalogue. The message names the file, column, row and value, and says what to do."""
