"""The little script of the HTML report. Without it everything is there to read; with it drawings answer a pointer at
once, timelines can be zoomed (buttons, or the wheel with Ctrl) and dragged, predicted and measured ones together, and
tables are sorted by a click on a heading."""

SCRIPT = """
(function () {
  var tip = document.createElement('div');
  tip.className = 'tip';
  tip.setAttribute('role', 'status');
  document.body.appendChild(tip);
  function text(target) {
    var title = target.querySelector && target.querySelector(':scope > title');
    return title ? title.textContent : '';
  }
  document.addEventListener('pointermove', function (event) {
    var found = event.target.closest && event.target.closest('svg rect, svg circle') ? text(event.target) : '';
    tip.style.display = found ? 'block' : 'none';
    if (!found) return;
    tip.textContent = found;
    var right = event.clientX + 14 + tip.offsetWidth > document.documentElement.clientWidth;
    tip.style.left = (right ? event.clientX - tip.offsetWidth - 10 : event.clientX + 14) + 'px';
    tip.style.top = (event.clientY + 16) + 'px';
  });
  document.addEventListener('pointerleave', function () { tip.style.display = 'none'; });

  var lines = Array.from(document.querySelectorAll('svg.timeline')), views = [];
  lines.forEach(function (svg) {
    var left = +svg.dataset.left, width = svg.viewBox.baseVal.width;
    var shapes = Array.from(svg.querySelectorAll('rect:not(.idle), text.on')).filter(function (shape) {
      return +shape.getAttribute('x') >= left - 1;
    }).map(function (shape) {
      return [shape, +shape.getAttribute('x'), +(shape.getAttribute('width') || 0)];
    });
    var ends = svg.querySelectorAll('text.small:not([x="0"])');
    var clip = document.createElementNS(svg.namespaceURI, 'clipPath');
    clip.id = 'plot' + views.length;
    clip.innerHTML = '<rect x="' + left + '" y="0" width="' + (width - left) + '" height="9999"/>';
    svg.appendChild(clip);
    shapes.forEach(function (shape) { shape[0].setAttribute('clip-path', 'url(#' + clip.id + ')'); });
    var view = { group: svg.dataset.group, zoom: 1, at: left };
    view.draw = function () {
      view.at = Math.max(left, Math.min(view.at, width - (width - left) / view.zoom));
      shapes.forEach(function (shape) {
        shape[0].setAttribute('x', left + (shape[1] - view.at) * view.zoom);
        if (shape[2]) shape[0].setAttribute('width', shape[2] * view.zoom);
      });
      ends.forEach(function (label) { label.style.visibility = view.zoom > 1 ? 'hidden' : 'visible'; });
      svg.dataset.zoom = view.zoom;
    };
    views.push(view);
    function all(zoom, at) {
      views.forEach(function (other) {
        if (other.group !== view.group) return;
        other.zoom = zoom;
        other.at = at;
        other.draw();
      });
    }
    function change(factor, where) {
      var before = view.at + (where - left) / view.zoom;
      var zoom = Math.max(1, Math.min(400, view.zoom * factor));
      all(zoom, before - (where - left) / zoom);
    }
    function place(event) {
      var box = svg.getBoundingClientRect();
      return Math.max(left, (event.clientX - box.left) / box.width * width);
    }
    svg.addEventListener('wheel', function (event) {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      change(event.deltaY < 0 ? 1.3 : 1 / 1.3, place(event));
    }, { passive: false });
    var held = null;
    svg.addEventListener('pointerdown', function (event) { if (view.zoom > 1) held = place(event); });
    svg.addEventListener('pointermove', function (event) {
      if (held === null) return;
      var now = place(event);
      all(view.zoom, view.at - (now - held) / view.zoom);
      held = now;
    });
    ['pointerup', 'pointerleave'].forEach(function (name) {
      svg.addEventListener(name, function () { held = null; });
    });
    var bar = document.createElement('div');
    bar.className = 'zoom';
    [['+', 2, 'zoom in'], ['-', 0.5, 'zoom out'], ['all', 0, 'show all']].forEach(function (item) {
      var button = document.createElement('button');
      button.textContent = item[0];
      button.setAttribute('aria-label', item[2]);
      button.addEventListener('click', function () {
        if (item[1]) change(item[1], left + (width - left) / 2); else all(1, left);
      });
      bar.appendChild(button);
    });
    svg.parentNode.parentNode.insertBefore(bar, svg.parentNode);
  });

  document.querySelectorAll('table.sorts').forEach(function (table) {
    var body = table.tBodies[0], heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      var button = document.createElement('button');
      button.textContent = head.textContent;
      head.textContent = '';
      head.appendChild(button);
      button.addEventListener('click', function () {
        var down = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
        heads.forEach(function (other) { other.removeAttribute('aria-sort'); });
        head.setAttribute('aria-sort', down > 0 ? 'ascending' : 'descending');
        Array.from(body.rows).sort(function (a, b) {
          var x = a.cells[column].dataset.v, y = b.cells[column].dataset.v;
          if (x !== undefined || y !== undefined) return down * ((x || -1) - (y || -1));
          return down * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        }).forEach(function (row) { body.appendChild(row); });
      });
    });
  });
})();
"""
