"""What all report pages share: figures without a window (`figures`), HTML that loads nothing (`html`), one style."""
