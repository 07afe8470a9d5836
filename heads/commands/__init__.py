"""heads.commands"""
