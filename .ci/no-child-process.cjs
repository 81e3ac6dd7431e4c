// Stands in the bundle for the module that nothing in it calls.
