"""heads.metrics"""
