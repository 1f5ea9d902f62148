"""Networks: tensors to tensors, no losses."""
