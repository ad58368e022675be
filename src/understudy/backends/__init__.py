"""Where models live. The rest of the package knows them by the three protocols in ``protocols``."""
