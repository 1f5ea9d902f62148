"""Deep novelty (Perera & Patel 2019). equations: membership loss, eq. 3 and 4; network: two branches; reference: the
second data set; page: globally negative filters.
"""
