"""heads.runs"""
