"""What ``domains`` and ``report`` show people of a store's columns, units and domains: text, figure and page."""
