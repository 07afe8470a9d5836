"""heads.models"""
