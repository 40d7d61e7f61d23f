"""What happens inside attention: how queries and keys meet (maps), which parts of the model make a score
(decomposition), what the weights say by themselves (weights), and which earlier heads a head reads (composition).
What may be touched here: the maths of one layer. Nothing here intervenes, draws or writes results."""
