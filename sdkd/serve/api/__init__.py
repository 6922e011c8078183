"""The HTTP APIs of `sdkd serve`: its own, OpenAI's and A1111's."""
