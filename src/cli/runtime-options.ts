/** What QEMU's qcow2 driver can be told of an image that it opens. Most of it is about QEMU's own caches, and means nothing here. */

import type { OptionType } from './options.js'

const CHECKED = [
  'main-header',
  'active-l1',
  'active-l2',
  'refcount-table',
  'refcount-block',
  'snapshot-table',
  'inactive-l1',
  'inactive-l2',
  'bitmap-directory',
]

/** What each option takes. */
const RUNTIME_OPTIONS: Readonly<Record<string, OptionType>> = {
  'lazy-refcounts': 'bool',
  'pass-discard-request': 'bool',
  'pass-discard-snapshot': 'bool',
  'pass-discard-other': 'bool',
  'discard-no-unref': 'bool',
  'overlap-check': 'string',
  'overlap-check.template': 'string',
  ...Object.fromEntries(CHECKED.map(name => [`overlap-check.${name}`, 'bool' as const])),
  'cache-size': 'size',
  'l2-cache-size': 'size',
  'l2-cache-entry-size': 'size',
  'refcount-cache-size': 'size',
  'cache-clean-interval': 'number',
}

/** What an option takes; undefined for one that the driver does not know. */
export const runtimeOption = (name: string): OptionType | undefined =>
  Object.hasOwn(RUNTIME_OPTIONS, name) ? RUNTIME_OPTIONS[name] : undefined

/** What `overlap-check` can be. */
export const OVERLAP_TEMPLATES = ['none', 'constant', 'cached', 'all']
