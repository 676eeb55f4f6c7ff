"""Action decoders: one file a decoder, all of them fit the socket `ActionDecoder`."""
