"""Facts, figures and the HTML page of a store, for the commands ``domains`` and ``report``."""
