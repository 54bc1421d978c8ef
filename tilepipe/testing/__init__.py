"""What tests of networks, engines and storage need; nothing else imports it.

``pip install 'tilepipe[testing]'`` installs what it needs besides:
hypothesis, which only `tilepipe.testing.strategies` imports.

- `tilepipe.testing.zoo`: small networks by name; `networks` and `refusals` hold their classes.
- `tilepipe.testing.exact`: compares the tiles of a network with one pass over the whole image.
- `tilepipe.testing.strategies`: hypothesis strategies for volumes, regions and tiles.
- `tilepipe.testing.storage`: storage that fails on demand, in this process and in others.
- `tilepipe.testing.engines`: work of which some tiles fail or kill their process, for engines.
"""
