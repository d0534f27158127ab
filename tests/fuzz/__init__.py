"""Random models and random plans: what every plan computes is what one device computes.

`program` holds a model as source text, `builder` and the modules `products`, `elementwise`, `shapes`, `writes`,
`whole` and `losses` draw one, `plan_draws` draws plans, `check` compares. ``python -m tests.fuzz`` is the long run.
"""
