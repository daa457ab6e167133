"""How modules of other libraries are taken over; one module a library, imported only when asked for."""
