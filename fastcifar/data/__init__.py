"""How bytes become arrays: archives, pickles, data sets and the store."""
