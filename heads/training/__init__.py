"""heads.training"""
