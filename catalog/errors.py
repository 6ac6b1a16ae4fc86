"""What is wrong with the data that a person brought, in words for them."""


class CatalogError(ValueError):
    """Input that makes no catalogue. The message names the file, column, row and value, and says what to do."""
