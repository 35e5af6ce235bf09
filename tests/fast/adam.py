"Adam from its paper, for every reference that needs it."


def adam(m, v, g, k:int) -> tuple: # moments after the k-th gradient g, and the direction in which to step
    "β 0.9 and 0.999, ε 1e-8, both moments without their bias towards zero"
    m, v = .9*m + .1*g, .999*v + .001*g**2
    return m, v, m/(1 - .9**k)/((v/(1 - .999**k)).sqrt() + 1e-8)
