// Every line, in the order in which they are run and told.

import { commit, rebase } from './chains.mjs'
import { line as convert } from './convert.mjs'
import { line as encryption } from './encryption.mjs'
import { line as formats } from './formats.mjs'
import { line as guest } from './guest.mjs'
import { line as installation } from './installation.mjs'
import { line as jobs } from './jobs.mjs'
import { check, compare, map, measure } from './looking.mjs'
import { line as micro } from './micro.mjs'
import { line as reflink } from './reflink.mjs'
import { line as requests } from './requests.mjs'
import { line as scale } from './scale.mjs'
import { line as small } from './small.mjs'
import { line as snapshot } from './snapshot.mjs'

export const lines = [
  convert,
  formats,
  reflink,
  check,
  map,
  measure,
  compare,
  commit,
  rebase,
  snapshot,
  small,
  jobs,
  requests,
  scale,
  encryption,
  micro,
  installation,
  guest,
]
