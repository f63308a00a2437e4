"""Change instances of modules and change them back: dynamic classes, plans, one transaction, and who holds which mode.

Nothing here knows about attention. `classes` builds the class that an instance gets, `record` holds all that one module gets and
had before, `instance_forward` handles forwards that other tools put on an instance, `apply` makes the change. `modes` are the
modes that there are, and `in_use` keeps threads and tasks apart.
"""
