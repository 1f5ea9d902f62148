"""Networks: tensors to tensors, no losses. network: any timm network with weights, heads and normalisation, one file
format; vit: the packed, masked ViT (attention: its backends); layers: maps and features of inner layers; weights: files
of others; flops: what a pass costs.
"""
