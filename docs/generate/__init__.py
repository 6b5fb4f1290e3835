"""What the site says of methods and claims, made from the catalogue, the classes, the registrations and the records.

What lives here:

- `cards`: a page a method; the catalogue.
- `evidence`: a claim and its record, as words and rows.
- `facts`: a method's parameters, description and use, from its class.
- `notes`: the few sentences on a card that are written by hand.
- `pages`: pages made from the README and other files of the repository, and from docstrings.
- `text`: links, inline code, templates.

Nothing here knows MkDocs; `hooks` beside this folder hands the pages to it.
"""
