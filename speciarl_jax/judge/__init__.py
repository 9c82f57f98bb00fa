"""The judge's room: a client that loses nothing, an offline judge, and a server for it.

Read in this order: `base` (the types), `config`, `parse`, `prompt`, `client` (what happens to a
pair), `endpoints` (who is asked), `cache`, `runner` (the door for a synchronous trainer),
`taxonomy` and `server` (the offline judge). Nothing here imports jax.
"""
