"""The mixture layer: down experts, up experts and a small token-wise matrix between them."""
