"""`elm serve`: ELMs behind an address that speaks OpenAI's protocol, and the engines that write their answers."""
