"""heads.evaluation"""
