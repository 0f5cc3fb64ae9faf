"Heading anchors as Quarto (pandoc) makes them, so that links mean the same in both sites."
import re


def pandoc(heading): return re.sub(r'[^\w\s.-]', '', heading).strip().lower().replace(' ', '-')
